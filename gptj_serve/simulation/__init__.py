"""What a deployment would do under a load: the real scheduler and scaling policy over stages of known speed."""
