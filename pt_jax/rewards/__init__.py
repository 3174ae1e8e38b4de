"""Rewards: a completion and its row in, one number out. Plain Python, because they judge text."""
