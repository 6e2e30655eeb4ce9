//! The protobuf codec with small buffers: tonic's own keeps 8 KiB per stream for each direction.
