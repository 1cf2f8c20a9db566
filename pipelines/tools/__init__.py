"""Tools: commands beside the stages, each ``latentline NAME`` or ``python -m pipelines.tools.NAME``.

Before a run ``plan`` and ``doctor``; of a trained model ``sample``, ``export`` (with ``model_card``) and
``reconstruct``; of finished runs ``compare`` and ``sync``; of this machine ``benchmark`` (with ``benchmark_data`` and
``paired_timing``). The top storey: a tool may import everything below, and nothing imports a tool.
"""
