"""The mathematics of diffusion, as pure functions of tensors: no network, no device, no randomness of its own.

    schedule.py      noise levels, schedules, and the two processes that map a time to a mixture of data and noise
    prediction.py    targets that a network may predict, and conversions between all of them
    posterior.py     one step of noising and its reversal, q(x_t | x_s) and q(x_s | x_t, x_0)
    objective.py     training: times, targets, weights, losses
    guidance.py      classifier-free guidance
    spacing.py       noise levels at which a sampler calls the network
    samplers.py      from noise to data and back
    likelihood.py    the variational bound, term by term

Everything computes in the dtype of the latents it is given; scalars of a sampler are float64. Imports torch, pydantic
and the standard library only.
"""
