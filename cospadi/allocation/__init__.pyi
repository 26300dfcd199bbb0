from .assignment import AllocationAccount, Assignment, GroupPlan, allocate, check_plan, families_of, uniform_assignment
from .base import Allocation, Allocator
from .budget import DENSE_BITS, Budget, GroupShape
from .choices import Choice, Factors, Method, Quantized
from .matching import match_groups, pair_distances
from .menu import Entry, Menu
from .offers import Corrections
from .profile import SPARSE, Families, GroupProfile, Point, is_complete, profile_group, sizes

__all__ = [
    "DENSE_BITS",
    "SPARSE",
    "Allocation",
    "AllocationAccount",
    "Allocator",
    "Assignment",
    "Budget",
    "Choice",
    "Corrections",
    "Entry",
    "Factors",
    "Families",
    "GroupPlan",
    "GroupProfile",
    "GroupShape",
    "Menu",
    "Method",
    "Point",
    "Quantized",
    "allocate",
    "check_plan",
    "families_of",
    "is_complete",
    "match_groups",
    "pair_distances",
    "profile_group",
    "sizes",
    "uniform_assignment",
]
