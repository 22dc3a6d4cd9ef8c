# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""tokred: kernels for token reduction in transformers, as torch ops. See ``python -m tokred ops``."""

from tokred import _ext
from tokred._version import __version__ as __version__
from tokred.attend import *  # noqa: F403
from tokred.compact import *  # noqa: F403
from tokred.merge import *  # noqa: F403
from tokred.score import *  # noqa: F403
from tokred.select import *  # noqa: F403

build_info = _ext.build_info
