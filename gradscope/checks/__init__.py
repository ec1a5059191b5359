"""Checks: is a model measured correctly, and does it agree with mean-field theory?"""
