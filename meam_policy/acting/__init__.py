"""What stands between an observation and an action: flattening, queues, safety."""
