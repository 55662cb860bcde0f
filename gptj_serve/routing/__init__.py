"""Which of several pipelines a request goes to."""
