//! Disks that are full, forbidden or gone while a run saves.
