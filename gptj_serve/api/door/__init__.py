"""What stands between the network and the routes: who may ask, how much, for how long."""
