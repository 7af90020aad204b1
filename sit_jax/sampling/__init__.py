"""From noise to data: guidance and the probability-flow ODE, over one callable `predict(x_bhwc, t_b)`."""
