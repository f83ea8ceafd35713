"""The programs, one a stage: encode, train, evaluate, and the demo that runs them all."""
