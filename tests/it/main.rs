mod generated_code;
