"""Tools: commands beside the stages, each one module; ``latentline`` (``command``) lists and starts them.

Before a run ``doctor`` (with ``doctor_checks``) and ``plan``; with a trained model ``sample``, ``export`` (with
``model_card``) and ``reconstruct``; with records ``compare``, ``report``, ``trace`` and ``sync``; and ``benchmark``
(with ``benchmarks``). The top storey: tools may import everything, and nothing imports them.
"""
