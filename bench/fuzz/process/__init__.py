"""Where inputs run: a server that forks a child for every input, and the limits of the child."""
