from hpt_hf.convert import main

if __name__ == "__main__":
    main()
