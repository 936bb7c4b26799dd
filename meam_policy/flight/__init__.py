"""The flight recorder: what a policy saw and did, tick by tick, in an MCAP file."""

from meam_policy.flight.flight_reader import Flight, FlightRecord, read_flight
from meam_policy.flight.recorder import FlightRecorder
from meam_policy.flight.recording import Recording

__all__ = ["Flight", "FlightRecord", "FlightRecorder", "Recording", "read_flight"]
