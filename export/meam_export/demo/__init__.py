"""`meam demo`: the whole way on real data, from recording to acting, and a report of it."""
