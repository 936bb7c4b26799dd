"""Gymnasium environments: making them, checking them, drawing them."""
