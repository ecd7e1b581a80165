"""What people look at, as functions of scores, rollouts and images."""
