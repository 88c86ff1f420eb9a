"""The bundle, and the engines that open or build it. Everything else stands on this package; it imports none of the others."""
