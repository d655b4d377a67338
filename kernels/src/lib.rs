//! Every piece of math of the trainer, one file per operation.
