"""Pretrained weights in, trained weights out."""
