"""The losses of ME-AM and its relatives, and one update of them."""
