"""How many pipelines are needed. Imports neither ray nor torch: the service and the simulation decide alike."""
