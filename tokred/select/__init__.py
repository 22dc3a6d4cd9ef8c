# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Which tokens to keep: lists from scores and from the tokens themselves."""

from tokred.select.grid_dilate import grid_dilate as grid_dilate
from tokred.select.list_to_mask import list_to_mask as list_to_mask
from tokred.select.list_to_slots import list_to_slots as list_to_slots
from tokred.select.list_union import list_union as list_union
from tokred.select.select_budget import select_budget as select_budget
from tokred.select.select_diverse import select_diverse as select_diverse
from tokred.select.select_rule import select_rule as select_rule
from tokred.select.select_topk import select_topk as select_topk
from tokred.select.soft_topk import soft_topk as soft_topk
from tokred.select.straight_through import straight_through as straight_through
