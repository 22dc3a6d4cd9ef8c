# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The version: read by the build without importing torch."""

__version__ = "0.1.0"
