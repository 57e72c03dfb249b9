"""Quantized weights in the formats that engines read, without rounding again."""
