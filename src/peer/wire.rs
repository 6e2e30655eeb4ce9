//! What passes before HTTP/2 sees it.
