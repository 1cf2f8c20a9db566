"""Networks and the mathematics of diffusion: tensors in, tensors out.

Read ``latent_diffusion`` (the trained model: encode, decode, sample) first, then its parts: ``autoencoder``, and
``denoiser``, where ``unet``, ``conditioning`` and ``diffusion`` meet. ``layers`` and ``attention`` serve the networks,
``features`` and ``metrics`` the evaluation, ``diffusers`` converts configs and weights. Nothing of ``data`` or
``pipelines`` is imported here, users' mistakes are ``ValueError``, and all noise is handed in.

Equivalences with other implementations, and their tolerances. Theirs are of diffusers where nothing else is said;
whole trajectories of samplers and whole calls of networks are compared, with the same weights and the same noise.

    ours                           theirs                                  tolerance       test_...
    linear schedule                numpy, float64                          1e-15 relative  diffusion_schedule
    linear, scaled-linear, cosine  DDIMScheduler (its tables are float32)  1e-7            diffusion_schedule
    zero terminal SNR              rescale_zero_terminal_snr, float64      same bits       diffusion_schedule
    v                              DDIMScheduler.get_velocity (float32)    1e-5            diffusion_prediction
    beta, beta-tilde, learned      DDPMScheduler (float32), logarithms     1e-3            diffusion_prediction
    min-SNR, P2, truncated SNR     the papers' formulas                    1e-9 relative   diffusion_objective
    hybrid loss                    the authors' formulas, float64          1e-9 relative   diffusion_objective
    rescaled guidance              rescale_noise_cfg                       1e-7            diffusion_guidance
    variational bound, each term   closed form for Gaussian data           1e-9 relative   diffusion_likelihood
    ddim, its inversion, ddpm      DDIM-, DDIMInverse-, DDPMScheduler      1e-9            diffusion_samplers_reference
    euler, heun, dpm_solver_pp     theirs (float32), on flows too          1e-5            diffusion_samplers_reference
    steps of a spacing             timesteps of DDIMScheduler              equal           diffusion_samplers_reference
    UNet                           UNet2DModel, UNet2DConditionModel       1e-5            diffusers_format
    AutoencoderKL                  AutoencoderKL                           1e-5            diffusers_format
    numbers of parameters          the same                                equal           diffusers_format
    samples of an exported model   their networks and schedulers           1e-3            export
    a single file of both          from_single_file of their networks      1e-5            diffusers_format
    attend                         the formula; backends with each other   1e-5            networks_attention
    SelfAttention, CrossAttention  torch's MultiheadAttention              1e-5            networks_attention
    TextEncoder (MiniLM)           torch's TransformerEncoderLayer         1e-5            text_encoders
    TextEncoder (CLIP), its U-Net  StableDiffusionPipeline                 1e-5            foreign
    guidance by a negative prompt  StableDiffusionPipeline                 1e-3            foreign
    Perceptual (LPIPS)             a second implementation of the paper    1e-5 relative   networks_perceptual
    averages of weights            the plain recurrence, float64           1e-12           ema
"""
