//! Collectives behind one lane type: Solo, Threads and MPI.
