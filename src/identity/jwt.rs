//! JWT-SVIDs of others: parsing and validation.
