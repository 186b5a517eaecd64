"""Check over HTTP that an OpenAI-compatible server answers the same request with the same bytes."""
