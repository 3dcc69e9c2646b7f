"""The units' bytes: layout, ring, and the store that brings them where they are computed with."""
