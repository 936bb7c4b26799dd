"""`meam demo`: the whole pipeline on real data, from recording to acting, and a report on it."""
