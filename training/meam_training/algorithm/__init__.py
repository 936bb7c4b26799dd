"""The losses of ME-AM and related methods, and the update that combines them."""
