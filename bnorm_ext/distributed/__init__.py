"""Batch normalisation with statistics over several processes.

``module.py`` is what users see, ``function.py`` the step and its gradient, ``statistics.py`` how
the ranks' statistics become those of all, ``collectives.py`` what is sent, ``agreement.py`` the
check that all ranks run the same layer, ``composite.py`` the same in plain torch.
"""

from .module import SyncBatchNorm

__all__ = ["SyncBatchNorm"]
