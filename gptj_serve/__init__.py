"""gptj_serve: GPT-J behind an API of your own, split over pipeline stages, run by Ray Serve."""

__version__ = "0.1.0"
