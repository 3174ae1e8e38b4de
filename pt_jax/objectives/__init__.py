"""Objectives of policy-gradient methods: one loss a token, to be minimised; the mean is taken by ``weights``."""
