"""Gymnasium environments: making, checking and rendering them."""
