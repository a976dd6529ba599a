"""Fault injection: each test causes one fault and checks the outcome."""
