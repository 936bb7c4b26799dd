"""Looking at a policy and at a machine before they act."""
