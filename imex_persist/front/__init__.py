"""What a user meets before a kernel runs: settings, the plan of a model, the machine's topology, and the self-test."""
