"""The mathematics of diffusion, as pure functions of tensors: no network, no device, no randomness of its own.

    schedule.py      which mixture of data and noise belongs to which time: noise levels, and the two processes
    prediction.py    what a network may predict, and how each prediction becomes every other
    posterior.py     one step of noising and its reversal, q(x_t | x_s) and q(x_s | x_t, x_0)
    objective.py     training: times, targets, weights, losses
    guidance.py      classifier-free guidance
    spacing.py       at which noise levels a sampler asks the network
    samplers.py      from noise to data and back
    likelihood.py    the variational bound, term by term

Everything computes in the dtype of the latents it is given; scalars of a sampler are float64.
"""
