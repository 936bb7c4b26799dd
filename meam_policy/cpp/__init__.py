"""Acting from C++ and C: `meam_policy.hpp`, and the project around it that `meam cpp` writes."""
