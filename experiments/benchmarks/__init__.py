"""Speed of rollouts and updates beside other systems and beside the machine's limits, each from one run."""
