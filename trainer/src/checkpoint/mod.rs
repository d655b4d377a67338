//! Mesh-free checkpoints: saved on any mesh, loaded on any other.
