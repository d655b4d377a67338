//! Token data: from text to Parquet shards, and from shards to packed samples in a fixed order.
