"""Losses of supervised and preference tuning: arrays in, one unreduced value a token or a row out."""
