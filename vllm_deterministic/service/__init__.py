"""The verification service: a thin HTTP face of the verifying half, with a schedule, a history and metrics."""
