# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Attention over selected keys and values."""

from tokred.attend.attend_selected import attend_selected as attend_selected
from tokred.attend.log_size_dims import log_size_dims as log_size_dims
