from hpt_hf.verify import main

if __name__ == "__main__":
    main()
